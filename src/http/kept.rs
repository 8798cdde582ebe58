//! Answers written once and given to everybody who asks for the same while the records are the same. Panels and
//! scripts ask again and again for what has not changed; reading, checking and writing it out anew is most of what an
//! answer costs. It holds only what follows from the records alone, whoever asks. Handlers call it through `answer`.
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use axum::http::HeaderValue;
use bytes::Bytes;
use host::Version;

use crate::limits::KEPT_BYTES_MAX;

/// The parts of an answer that are the same for every caller.
#[derive(Debug, Clone)]
pub(crate) struct Written {
    /// JSON.
    pub(crate) body: Bytes,
    /// Of a resource.
    pub(crate) etag: Option<HeaderValue>,
    /// Whether a caller who has this tag has this body.
    pub(crate) is_versioned: bool,
}

/// Answers by path and query, as of one version of the records.
#[derive(Debug, Default)]
pub(crate) struct Kept(Mutex<Held>);

#[derive(Debug, Default)]
struct Held {
    as_of: Option<Version>,
    bytes: usize,
    by_path: HashMap<String, Written>,
}

impl Kept {
    /// The answer kept for `path`, if it holds in `version`.
    pub(crate) fn find(&self, version: Option<Version>, path: &str) -> Option<Written> {
        let held = self.held();
        held.by_path.get(path).filter(|_| version.is_some() && held.as_of == version).cloned()
    }

    /// Keeps an answer. `version` was taken before the records were read for it.
    pub(crate) fn keep(&self, version: Option<Version>, path: &str, written: &Written) {
        let bytes = path.len() + written.body.len();
        if version.is_none() || bytes > KEPT_BYTES_MAX {
            return;
        }
        let mut held = self.held();
        if held.as_of != version || held.bytes + bytes > KEPT_BYTES_MAX {
            *held = Held { as_of: version, ..Held::default() };
        }
        // Two callers may have made the same at once; then one of them replaces the other's.
        if held.by_path.insert(path.to_owned(), written.clone()).is_none() {
            held.bytes += bytes;
        }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(length: usize) -> Written {
        Written { body: Bytes::from(vec![b'1'; length]), etag: None, is_versioned: false }
    }

    #[tokio::test]
    async fn an_answer_holds_for_its_version_alone_and_only_so_many_are_kept() {
        let world = crate::stage::Stage::new();
        let host = world.open().await;
        let before = host.version();
        let kept = Kept::default();
        kept.keep(before, "/a", &written(10));
        assert_eq!(kept.find(before, "/a").unwrap().body.len(), 10);
        assert!(kept.find(before, "/b").is_none());
        assert!(kept.find(None, "/a").is_none(), "what cannot be told is not known");

        host.tokens().create("changes the records", None).await.unwrap();
        let after = host.version();
        assert_ne!(before, after);
        assert!(kept.find(after, "/a").is_none());

        for path in ["/a", "/b", "/c"] {
            kept.keep(after, path, &written(KEPT_BYTES_MAX / 2 - 10));
        }
        assert!(kept.find(after, "/a").is_none(), "the bound was passed, so it began anew");
        assert!(kept.find(after, "/c").is_some());
        kept.keep(after, "/d", &written(KEPT_BYTES_MAX));
        assert!(kept.find(after, "/d").is_none());
        assert!(kept.held().bytes <= KEPT_BYTES_MAX);
    }
}
