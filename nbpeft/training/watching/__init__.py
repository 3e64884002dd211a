"""What goes on during a run besides its steps: answers, trackers, stopping early or when it diverges."""
