"""Who may call what, and how much: API keys, certificates, the policy, the limits. Knows neither gRPC nor HTTP."""
