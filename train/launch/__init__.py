"""Files for launchers of many devices; `python -m ldrt_edge.train.launch NAME` prints where one lies."""
