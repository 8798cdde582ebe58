//! The nouns customers see, as plain data with their JSON. No I/O, no behaviour beyond checking a value.
//! `host` fills them, `http` serves them, `cli` reads them; the OpenAPI document is made from them.
#![forbid(unsafe_code)]

pub mod bulk;
pub mod console;
pub mod cpu;
pub mod event;
pub mod host;
pub mod id;
pub mod image;
pub mod limits;
pub mod metrics;
pub mod migration;
pub mod name;
pub mod network;
pub mod operation;
pub mod page;
pub mod problem;
pub mod server;
pub mod snapshot;
pub mod time;
pub mod volume;

pub use id::{
    ConsoleReaderId, EventId, ImageId, NetworkId, OperationId, ServerId, SnapshotId, TokenId, VolumeId,
};
pub use name::{Labels, Name};
pub use problem::{Code, FieldError, Problem};
pub use time::Time;
