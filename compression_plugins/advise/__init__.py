"""Which scheme helps, before the job starts: measured network and codecs, a model of the step, a recommendation."""
