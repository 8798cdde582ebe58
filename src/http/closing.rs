//! The daemon's order to end, as every stream and connection hears it.
use tokio::sync::watch;

/// Hears the order; cloned for everyone who has to.
#[derive(Debug, Clone)]
pub(crate) struct Closing(watch::Receiver<bool>);

impl Closing {
    /// The one who gives the order, and the first who hears it.
    pub(crate) fn new() -> (watch::Sender<bool>, Closing) {
        let (order, heard) = watch::channel(false);
        (order, Closing(heard))
    }

    /// Ends when the order was given, or when nobody is left to give it.
    pub(crate) async fn ordered(&mut self) {
        let _ = self.0.wait_for(|closing| *closing).await;
    }
}
