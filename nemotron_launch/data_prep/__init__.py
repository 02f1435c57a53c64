"""Raw sources to shards of training rows with a manifest; runs in the job of data_prep/rl_prep, imports no torch."""
