"""AMQP on RabbitMQ, without knowing of groups: connections, confirmed publishes, streams, queues, refusals."""
