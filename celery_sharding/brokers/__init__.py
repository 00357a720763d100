"""What stands behind the groups: RabbitMQ, or an embedded broker."""
