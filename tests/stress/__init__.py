"""Many processes on few keys of a claim store, some of which die, pause and give up; `make stress`."""
