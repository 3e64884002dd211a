"""What a training writes and resumes from, with one process or several."""
