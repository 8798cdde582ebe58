//! Tests of the room: what is generated, and the real router over real sockets.
mod generated;
