"""What runs inside a job's processes. Nothing in the launcher imports a module from here that needs torch."""
