"""A laboratory network on this machine, the jobs that run on it, and what each rank of them measures."""
