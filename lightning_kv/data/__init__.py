"""What streams in: prompt shards and the panorama world."""
