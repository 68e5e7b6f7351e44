"""The contents of cluster/: the local head, the launcher's and KubeRay's files."""
