"""The only package that imports ray: clusters, pipelines, trainers."""
