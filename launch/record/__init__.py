"""The job folder: what a job is and what it leaves."""
