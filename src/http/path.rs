//! Ids in paths. A name in place of an id is told how to find the id.
use std::str::FromStr;

use axum::extract::{FromRequestParts, Path};
use axum::http::request::Parts;

use crate::error::Failure;

/// The `{id}` of the path.
pub(crate) struct Id<T>(pub(crate) T);

impl<S: Send + Sync, T: FromStr> FromRequestParts<S> for Id<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Id<T>, Failure> {
        let refused = || {
            Failure::parameter(
                "id",
                "not_a_uuid",
                "use the id, a UUID; list with ?name= to find the id of a name",
            )
        };
        let Path(text) = Path::<String>::from_request_parts(parts, state).await.map_err(|_| refused())?;
        // One spelling only: the one that lists give, of 36 characters with hyphens.
        if text.len() != 36 {
            return Err(refused());
        }
        text.parse().map(Id).map_err(|_| refused())
    }
}
