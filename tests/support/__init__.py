"""What tests share: shops, servers, publishers, commands. `apps` holds what workers import by short names."""
