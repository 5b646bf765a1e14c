"""The engine as a service: sessions, turns and jobs over HTTP, durable, and a page to work in."""
