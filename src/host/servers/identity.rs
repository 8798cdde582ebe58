//! Word of a clone's guest that it has become a server of its own. Images that can do that say it on the console, with the
//! server's id: nobody else's word is taken for it, and it is found again after a restart of the daemon. It is the guest's own
//! word, and says something about the guest alone.
use std::path::PathBuf;
use std::sync::Arc;

use model::ServerId;
use model::snapshot::GuestIdentity;

use super::console::{ConsolePiece, Output};
use super::record::{self, ServerRecord};
use super::registry::{Entry, Workshop};
use super::{advance, limits};
use crate::call::Actor;
use crate::error::Result;
use crate::store::{Tx, records};

/// Ends when the guest has said it, on the console whose ring lies at `path`: now or before. A console that cannot be read is
/// tried again.
pub(super) async fn word(entry: Arc<Entry>, path: PathBuf) {
    let id = entry.id;
    loop {
        match listen(entry.clone(), &path).await {
            Ok(true) => return,
            // The server is gone.
            Ok(false) => return std::future::pending().await,
            Err(cause) => tracing::debug!(server = %id, "{}", cause.chain()),
        }
        tokio::time::sleep(limits::RETRY_MAX).await;
    }
}

async fn listen(entry: Arc<Entry>, path: &std::path::Path) -> Result<bool> {
    let mut lines = Lines::new(entry.id);
    let mut output = Output::open(entry, path, 0).await?;
    while let Some(piece) = output.next().await? {
        if lines.take(&piece) {
            return Ok(true);
        }
        // A guest that prints all the time costs the host no more than this.
        tokio::time::sleep(limits::IDENTITY_EVERY).await;
    }
    Ok(false)
}

/// Records it. Repeatable.
pub(super) async fn renewed(workshop: &Workshop, id: ServerId) -> Result<()> {
    let note = move |tx: &Tx<'_>| match records::find::<ServerRecord>(tx, id.0)? {
        Some(mut record) if record.identity == Some(GuestIdentity::Unchanged) => {
            record.identity = Some(GuestIdentity::Renewed);
            record::save(tx, &mut record)?;
            advance::announce(tx, &record, "server.updated", Some(&Actor::Guest))
        }
        _ => Ok(()),
    };
    workshop.core.store.write(note).await
}

/// Looks for the line in pieces of output.
struct Lines {
    wanted: Vec<u8>,
    /// What there is of a line so far: never more than one byte longer than the one that is looked for.
    line: Vec<u8>,
    position: u64,
}

impl Lines {
    fn new(id: ServerId) -> Lines {
        Lines { wanted: format!("toft: identity renewed {id}").into_bytes(), line: Vec::new(), position: 0 }
    }

    /// Whether the line ends in this piece.
    fn take(&mut self, piece: &ConsolePiece) -> bool {
        if piece.start != self.position {
            // The rest of a line that was overwritten.
            self.line.clear();
        }
        self.position = piece.start.saturating_add(piece.data.len() as u64);
        for &byte in &piece.data {
            if matches!(byte, b'\r' | b'\n') {
                if self.line == self.wanted {
                    return true;
                }
                self.line.clear();
            } else if self.line.len() <= self.wanted.len() {
                self.line.push(byte);
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(pieces: &[(u64, &str)], id: ServerId) -> bool {
        let mut lines = Lines::new(id);
        let piece = |&(start, text): &(u64, &str)| ConsolePiece {
            start,
            data: text.replace("ID", &id.to_string()).into_bytes(),
            written: 0,
        };
        pieces.iter().any(|found| lines.take(&piece(found)))
    }

    #[test]
    fn only_the_whole_line_with_its_own_id_counts() {
        let id = ServerId::new();
        let other = format!("toft: identity renewed {}\r\n", ServerId::new());
        let cases: [(&[(u64, &str)], bool); 8] = [
            (&[(0, "toft: identity renewed ID\r\n")], true),
            (&[(0, "[  1.0] boot\r\nweb1 login: \r\ntoft: identity renewed ID\n")], true),
            (&[(0, "x\ntoft: ide"), (11, "ntity renewed ID\r")], true),
            (&[(0, "toft: identity renewed ID")], false),
            (&[(0, "echo toft: identity renewed ID\r\n")], false),
            (&[(0, "toft: identity renewed ID and more\r\n")], false),
            (&[(0, "toft: ide"), (999, "ntity renewed ID\r\n")], false),
            (&[(0, &other)], false),
        ];
        for (pieces, wanted) in cases {
            assert_eq!(heard(pieces, id), wanted, "{pieces:?}");
        }
    }

    #[test]
    fn a_line_without_an_end_takes_no_room() {
        let mut lines = Lines::new(ServerId::new());
        let data = vec![b'x'; 1 << 20];
        assert!(!lines.take(&ConsolePiece { start: 0, data, written: 0 }));
        assert!(lines.line.len() <= lines.wanted.len() + 1);
    }
}
