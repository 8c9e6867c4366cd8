"""What joins the core and the metrics: a file per command, and folders of what they share."""
