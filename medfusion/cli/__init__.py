"""The command line. Every command imports its heavy parts only when it runs."""
