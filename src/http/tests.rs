//! Tests of the room: what is generated, and the real router over real sockets.
mod callers;
mod errors;
mod generated;
mod networks;
mod served;
mod streams;
