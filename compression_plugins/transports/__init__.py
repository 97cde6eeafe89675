"""How bytes travel: torch.distributed, Horovod, and `local` (N ranks in one process, for tests and studies)."""
