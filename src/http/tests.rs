//! Tests of the room: what is generated, and the real router over real sockets.
mod bulk;
mod callers;
mod consoles;
mod errors;
mod fuzz;
mod generated;
mod migrations;
mod networks;
mod operations;
mod promises;
mod served;
mod servers;
mod snapshots;
mod streams;
mod uploads;
