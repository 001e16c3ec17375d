"""What stands between a run and its disks: checksums of checkpoints, and a copy on local disk."""
