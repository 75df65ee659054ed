"""Parts of long jobs on several processes and machines."""
