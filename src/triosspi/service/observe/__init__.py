"""What a server tells: logs, audit records, metrics, health, and the service manager."""
