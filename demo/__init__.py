"""The demo: its images, its runs and its pictures."""
