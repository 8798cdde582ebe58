//! Memory balloon (virtio 1.2, section 5.5): pages that the guest gives up, and free pages that it reports, return
//! to the host. It decides no target; an operator does, through [`BalloonControl`].

mod state;

mod config;
mod request;

mod backend;

mod device;

pub use device::{Balloon, BalloonControl, BalloonOptions, BalloonStats};
