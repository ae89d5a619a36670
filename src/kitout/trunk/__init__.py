"""The frozen trunk of a text model: the blocks below the first one that an adapter changes, computed once and kept."""
