"""Sites proven by one tiny forward: what runs, what attends, what is added."""
