"""What every part may use: numbers and errors in words, names, lists, class addresses, files."""
