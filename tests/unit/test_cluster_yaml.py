"""The launcher file passes Ray's own offline checks and keeps the promises of its comments."""

import copy
import re
from pathlib import Path

import pytest
import yaml

from stego_core.distributed.environment import _RAY_SETTINGS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "cluster.yaml").read_text()


@pytest.fixture
def config():
    return yaml.safe_load(TEXT)


def prepare(config):
    # `validate_config` wants every field filled in; alone it blames the Ray version instead.
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def impossible_pools(config):
    # Ray's schema lets these through.
    return [
        name
        for name, node_type in config["available_node_types"].items()
        if node_type["min_workers"] > node_type["max_workers"]
    ]


def starts(config, kind):
    return [line for line in config[f"{kind}_start_ray_commands"] if "ray start" in line]


def test_ray_accepts_the_file(config):
    prepared = prepare(config)
    assert set(prepared["available_node_types"]) == {"head", "gpu", "cpu"}


def test_no_pool_asks_for_more_nodes_than_it_may_have(config):
    prepared = prepare(config)
    assert impossible_pools(prepared) == []
    largest = [kind["max_workers"] for kind in prepared["available_node_types"].values()]
    assert max(largest) <= prepared["max_workers"]


def test_a_pool_that_asks_for_too_many_nodes_is_noticed(config):
    config["available_node_types"]["gpu"]["min_workers"] = 5
    assert impossible_pools(prepare(config)) == ["gpu"]


def unknown_key(config):
    config["available_node_types"]["gpu"]["min_wrokers"] = 0


def wrong_resource_type(config):
    config["available_node_types"]["head"]["resources"]["CPU"] = "none"


def unknown_head_type(config):
    config["head_node_type"] = "haed"


def more_than_the_cluster_may_have(config):
    config["available_node_types"]["gpu"]["min_workers"] = config["max_workers"] + 1


@pytest.mark.parametrize(
    "damage",
    [unknown_key, wrong_resource_type, unknown_head_type, more_than_the_cluster_may_have],
    ids=lambda damage: damage.__name__,
)
def test_a_broken_copy_is_rejected(config, damage):
    from jsonschema import ValidationError

    damage(config)
    with pytest.raises((ValidationError, ValueError), match=r"min_wrokers|'none'|head_node|max_w"):
        prepare(config)


def test_the_head_runs_no_work_and_the_pools_shrink_to_one_node(config):
    kinds = prepare(config)["available_node_types"]
    assert kinds["head"]["resources"]["CPU"] == 0
    assert kinds["head"]["max_workers"] == 0
    assert kinds["gpu"]["min_workers"] == 0
    assert kinds["cpu"]["min_workers"] == 1  # a job needs a CPU to start on
    assert kinds["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert 0 < config["idle_timeout_minutes"] <= 60


def test_the_dashboard_listens_on_loopback_only(config):
    (line,) = starts(config, "head")
    assert re.findall(r"--dashboard-host[= ](\S+)", line) == ["127.0.0.1"]
    assert "0.0.0.0" not in TEXT


def test_every_node_keeps_processes_that_wait(config):
    ((name, value),) = _RAY_SETTINGS.items()
    for kind in ("head", "worker"):
        (line,) = starts(config, kind)
        assert f" {name}={value} RAY_AUTH_MODE=token ray start " in line


def test_every_node_asks_for_the_token_and_has_it(config):
    for kind in ("head", "worker"):
        (line,) = starts(config, kind)
        assert "RAY_AUTH_MODE=token ray start" in line
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_no_node_hands_its_role_to_a_plain_request_and_disks_are_encrypted(config):
    for kind in config["available_node_types"].values():
        node = kind["node_config"]
        assert node["MetadataOptions"] == {"HttpTokens": "required"}
        assert all(disk["Ebs"]["Encrypted"] for disk in node["BlockDeviceMappings"])


def test_the_node_settings_are_those_that_ec2_knows(config):
    # botocore carries EC2's own description of a request.
    import botocore.session
    from botocore.validate import ParamValidator

    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances")
    for kind in config["available_node_types"].values():
        request = kind["node_config"] | {"MinCount": 1, "MaxCount": 1}
        report = ParamValidator().validate(request, shape.input_shape)
        assert not report.has_errors(), report.generate_report()
    wrong = request | {"MetadataOptions": {"HttpToken": "required"}}
    assert ParamValidator().validate(wrong, shape.input_shape).has_errors()


def test_the_object_store_gets_its_shared_memory(config):
    (option,) = [text for text in config["docker"]["run_options"] if "--shm-size" in text]
    assert int(re.fullmatch(r"--shm-size=(\d+)gb", option).group(1)) >= 4


def test_the_project_is_mounted_where_it_is_installed_from(config):
    (mounted,) = [remote for remote, local in config["file_mounts"].items() if local == "."]
    assert mounted.startswith("~/")
    assert any(
        line.startswith("pip install") and f"$HOME/{mounted[2:]}[" in line
        for line in config["setup_commands"]
    )


def test_the_images_hold_a_ray_and_a_python_that_the_project_accepts(config):
    project = (ROOT / "pyproject.toml").read_text()
    floor = tuple(map(int, re.search(r'"ray\[.*?\]>=([\d.]+)"', project).group(1).split(".")))
    images = set(re.findall(r"rayproject/ray:(\S+)-(py\d+)-(?:cpu|gpu)", TEXT))
    assert len(images) == 1
    ((version, python),) = images
    assert tuple(map(int, version.split("."))) >= floor
    assert python == "py311"


def test_three_fields_are_marked_for_editing():
    comments = re.findall(r"# EDIT (\d):", TEXT)
    assert sorted(comments) == ["1", "2", "3"]


def test_the_file_holds_no_key_no_account_and_no_address():
    # Access keys, account ids, ARNs, private keys, machine addresses other than loopback.
    found = re.findall(
        r"A[KS]IA\w{16}|\b\d{12}\b|arn:aws|BEGIN [A-Z ]*KEY|(?!127\.0\.0\.1)\b\d+\.\d+\.\d+\.\d+\b",
        TEXT,
    )
    assert found == []
    assert "ssh_private_key" not in TEXT
