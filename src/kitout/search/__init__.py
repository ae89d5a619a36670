"""Which design to choose: what worked before in runs like this one."""
