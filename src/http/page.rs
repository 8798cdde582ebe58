//! `?fields=`: answers with some top-level fields only. Which names a resource has is read from its schema, so
//! the list cannot fall behind the type. Handlers call it before they write an answer.
use bytes::Bytes;
use serde::Serialize;
use serde_json::Value;
use utoipa::PartialSchema;
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::Schema;

use crate::error::Failure;

/// The names asked for, known to be names of the resource.
#[derive(Debug, Clone)]
pub(crate) struct Fields(Vec<String>);

impl Fields {
    /// Reads `?fields=` for resources of type `T`.
    pub(crate) fn of<T: PartialSchema>(text: Option<&str>) -> Result<Option<Fields>, Failure> {
        let Some(text) = text else { return Ok(None) };
        let known = names::<T>();
        let asked: Vec<String> = text.split(',').map(str::to_owned).collect();
        match asked.iter().find(|name| !known.contains(name)) {
            Some(name) => {
                let detail = format!("there is no field {name:?}; there are {}", known.join(", "));
                Err(Failure::parameter("fields", "unknown_field", detail))
            }
            None => Ok(Some(Fields(asked))),
        }
    }

    /// Drops from one resource's JSON what was not asked for.
    fn keep(&self, value: &mut Value) {
        if let Value::Object(map) = value {
            map.retain(|name, _| self.0.iter().any(|asked| asked == name));
        }
    }
}

/// The JSON of one resource with the fields asked for.
pub(crate) fn project_one<T: Serialize>(resource: &T, fields: Option<&Fields>) -> serde_json::Result<Bytes> {
    let Some(fields) = fields else { return serde_json::to_vec(resource).map(Bytes::from) };
    let mut value = serde_json::to_value(resource)?;
    fields.keep(&mut value);
    serde_json::to_vec(&value).map(Bytes::from)
}

/// The JSON of a page whose items have the fields asked for.
pub(crate) fn project_page<T: Serialize>(page: &T, fields: Option<&Fields>) -> serde_json::Result<Bytes> {
    let Some(fields) = fields else { return serde_json::to_vec(page).map(Bytes::from) };
    let mut value = serde_json::to_value(page)?;
    if let Some(items) = value.get_mut("items").and_then(Value::as_array_mut) {
        items.iter_mut().for_each(|item| fields.keep(item));
    }
    serde_json::to_vec(&value).map(Bytes::from)
}

/// Names of the top-level fields of `T`, in alphabetical order.
fn names<T: PartialSchema>() -> Vec<String> {
    match T::schema() {
        RefOr::T(Schema::Object(object)) => object.properties.keys().cloned().collect(),
        _ => Vec::new(),
    }
}
