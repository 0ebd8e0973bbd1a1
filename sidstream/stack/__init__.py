"""The local stack: Kafka, Redis, MLflow and the product's services on one machine, kept up by one process."""
