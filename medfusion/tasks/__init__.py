"""The three tasks, each as a function of volumes and as a function of folders."""
