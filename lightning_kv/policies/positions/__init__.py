"""At which rotary time a held row appears."""
