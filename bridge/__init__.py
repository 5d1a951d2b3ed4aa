"""IKEv2 SA synchronization for session resumption, a sidecar for unmodified strongSwan."""
