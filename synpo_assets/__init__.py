"""The SynPO assets, one module per stage of the paper."""
