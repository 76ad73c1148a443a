"""The job folder: descriptions of a job, and of the files that it leaves."""
