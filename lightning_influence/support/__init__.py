"""Support: errors, checks of arguments, files, notes and random states; no tensor algebra, no Lightning."""
