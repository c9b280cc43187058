"""What `jobs/doctor.py` looks at, apart from Ray: machine, libraries, weights and stores."""
