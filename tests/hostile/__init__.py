"""Standing campaigns: what a stranger's file, server or moment can do to a command. `make fuzz` runs them, see campaign.py."""
