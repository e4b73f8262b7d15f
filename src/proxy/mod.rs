//! The data plane: how a request walks from the socket it came in on to the endpoint that answers it.
