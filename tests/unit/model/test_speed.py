from __future__ import annotations

import pytest
from torch import nn

from stego_core.config.schema import BackboneConfig
from stego_core.model import speed
from stego_core.model.speed import seconds_per_view


def test_the_time_of_a_view_is_that_of_the_whole_network_at_that_size(monkeypatch):
    seen = []
    build = speed.build_network

    def watched(name, *, device):
        network = build(name, device=device)
        network.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0].shape))
        assert isinstance(network, nn.Module)
        return network

    monkeypatch.setattr(speed, "build_network", watched)
    assert seconds_per_view(BackboneConfig(name="test_vit"), 64) > 0
    assert [tuple(shape)[1:] for shape in seen] == [(3, 64, 64)] * 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_networks_that_would_take_long_are_not_tried(monkeypatch, precision):
    monkeypatch.setattr(speed, "_LARGEST", 10)
    assert seconds_per_view(BackboneConfig(name="test_vit", precision=precision), 64) is None
