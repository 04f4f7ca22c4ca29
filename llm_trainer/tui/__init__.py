"""The watcher: a Textual app that shows run folders and starts, stops, resumes and queries runs. Loads no torch."""
