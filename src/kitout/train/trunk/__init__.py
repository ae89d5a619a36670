"""The frozen trunk in a run: what images and texts are below the first trained module, computed once per example."""
