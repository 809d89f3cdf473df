"""The manifests for Kubernetes with KubeRay; `python -m cluster.kuberay` writes what other files decide."""
