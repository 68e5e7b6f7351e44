"""What lies in cluster/: the local head, the launcher's and KubeRay's files."""
