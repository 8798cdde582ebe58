//! Makes the schemas as strict as the daemon is: bounds from `model::limits`, closed unions, references instead
//! of copies. Works on the document's JSON, because the derives cannot name constants.
use model::limits::{
    DESCRIPTION_CHARS_MAX, EXTERNAL_REF_CHARS_MAX, GRACE_S_MAX, LABEL_CHARS_MAX, LABELS_MAX,
    MEMORY_BYTES_MAX, MEMORY_BYTES_MIN, NICS_MAX, SSH_KEY_BYTES_MAX, SSH_KEYS_MAX, USER_DATA_BYTES_MAX,
    VOLUME_BYTES_MAX, VOLUME_BYTES_MIN,
};
use serde_json::{Map, Value, json};

/// Where the bounds of `model::limits` belong: JSON pointers into the schemas, and what is added there.
pub(super) fn bounds() -> Vec<(&'static str, Value)> {
    let label_key =
        json!({ "type": "string", "pattern": format!("^[A-Za-z0-9._/-]{{1,{LABEL_CHARS_MAX}}}$") });
    let label_value = format!("^[A-Za-z0-9._/-]{{0,{LABEL_CHARS_MAX}}}$");
    let labels = json!({
        "maxProperties": LABELS_MAX,
        "propertyNames": label_key,
        "additionalProperties": { "type": "string", "pattern": label_value },
    });
    let label_patch = json!({
        "maxProperties": LABELS_MAX,
        "propertyNames": label_key,
        "additionalProperties": { "type": ["string", "null"], "pattern": label_value },
    });
    let memory =
        json!({ "minimum": MEMORY_BYTES_MIN, "maximum": MEMORY_BYTES_MAX, "multipleOf": 2 * 1024 * 1024 });
    let disk = json!({ "minimum": VOLUME_BYTES_MIN, "maximum": VOLUME_BYTES_MAX, "multipleOf": 4096 });
    let description = json!({ "maxLength": DESCRIPTION_CHARS_MAX });
    vec![
        ("/Labels", labels),
        ("/CreateServer/properties/image", json!({ "minLength": 1, "maxLength": 63 })),
        ("/CreateServer/properties/memory_bytes", memory.clone()),
        ("/CreateServer/properties/disk_bytes", disk.clone()),
        ("/CreateServer/properties/nics", json!({ "maxItems": NICS_MAX })),
        ("/CreateServer/properties/ssh_keys", json!({ "maxItems": SSH_KEYS_MAX })),
        ("/CreateServer/properties/ssh_keys/items", json!({ "maxLength": SSH_KEY_BYTES_MAX })),
        ("/CreateServer/properties/user_data", json!({ "maxLength": USER_DATA_BYTES_MAX })),
        ("/CreateServer/properties/description", description.clone()),
        (
            "/CreateServer/properties/external_ref",
            json!({ "minLength": 1, "maxLength": EXTERNAL_REF_CHARS_MAX }),
        ),
        (
            "/PatchServer/properties/external_ref",
            json!({ "minLength": 1, "maxLength": EXTERNAL_REF_CHARS_MAX }),
        ),
        ("/CreateNic/properties/network", json!({ "minLength": 1, "maxLength": 63 })),
        ("/PatchServer/properties/memory_bytes", memory),
        ("/PatchServer/properties/description", description.clone()),
        ("/PatchServer/properties/labels", label_patch.clone()),
        ("/PatchImage/properties/description", description),
        ("/PatchImage/properties/labels", label_patch.clone()),
        ("/PatchVolume/properties/size_bytes", disk),
        ("/PatchVolume/properties/labels", label_patch.clone()),
        ("/CreateSnapshot/properties/description", json!({ "maxLength": DESCRIPTION_CHARS_MAX })),
        ("/RestoreServer/properties/snapshot", json!({ "minLength": 1, "maxLength": 63 })),
        ("/PatchSnapshot/properties/description", json!({ "maxLength": DESCRIPTION_CHARS_MAX })),
        ("/PatchSnapshot/properties/labels", label_patch.clone()),
        ("/PatchNetwork/properties/labels", label_patch),
        (
            "/CreateNetwork/properties/ipv4_cidr",
            json!({ "pattern": "^[0-9]{1,3}(\\.[0-9]{1,3}){3}/(1[6-9]|2[0-9])$" }),
        ),
        (
            "/CreateNetwork/properties/host_device",
            json!({ "pattern": "^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,14}$" }),
        ),
        ("/PatchServer/properties/nic_limits", json!({ "maxItems": NICS_MAX })),
        ("/PatchNicLimits/properties/index", json!({ "maximum": NICS_MAX - 1 })),
        ("/StopServer/properties/grace_s", json!({ "maximum": GRACE_S_MAX })),
        (
            "/MigrateServer/properties/target",
            json!({ "pattern": "^([0-9.]{7,15}|\\[[0-9A-Fa-f:.]{2,45}\\]):[0-9]{1,5}$" }),
        ),
        ("/MigrateServer/properties/ticket", json!({ "pattern": "^[0-9a-f]{64}\\.[0-9a-f]{64}$" })),
        ("/SettleMigration/properties/proof", json!({ "minLength": 10, "maxLength": 1000 })),
        ("/ImportImage/properties/sha256", json!({ "pattern": "^[0-9a-f]{64}$" })),
    ]
}

/// Adds the bounds; those whose place is gone are left out, which a test finds.
pub(super) fn bound(schemas: &mut Value) {
    for (pointer, more) in bounds() {
        if let (Some(Value::Object(schema)), Value::Object(more)) = (schemas.pointer_mut(pointer), more) {
            schema.extend(more);
        }
    }
}

/// Says of every integer without a maximum what its type can hold, which callers in other languages cannot know.
pub(super) fn bound_integers(schema: &mut Value) {
    match schema {
        Value::Object(members) => {
            let format = members.get("format").and_then(Value::as_str);
            let unsigned =
                members.get("minimum").and_then(Value::as_f64).is_some_and(|minimum| minimum >= 0.0);
            let bound = match (format, unsigned) {
                (Some("int64"), true) => Some(("uint64", json!(u64::MAX))),
                (Some("int64"), false) => Some(("int64", json!(i64::MAX))),
                (Some("int32"), true) => Some(("uint32", json!(u32::MAX))),
                _ => None,
            };
            if let Some((format, most)) = bound {
                members.insert("format".into(), json!(format));
                members.entry("maximum").or_insert(most);
            }
            members.values_mut().for_each(bound_integers);
        }
        Value::Array(items) => items.iter_mut().for_each(bound_integers),
        _ => {}
    }
}

/// A variant of an externally tagged union has its one member and no other.
pub(super) fn close_unions(schema: &mut Value) {
    let Some(variants) = schema.get_mut("oneOf").and_then(Value::as_array_mut) else { return };
    for variant in variants {
        let members = variant["properties"].as_object().map_or(0, Map::len);
        if members == 1 && variant["required"].as_array().is_some_and(|required| required.len() == 1) {
            variant["additionalProperties"] = json!(false);
        }
    }
}

/// Refers to the resource where a page or an answer holds a copy of its schema.
pub(super) fn refer(name: &str, schema: &mut Value) {
    let reference = |resource: &str| json!({ "$ref": format!("#/components/schemas/{resource}") });
    if let Some(resource) = name.strip_prefix("Page_") {
        schema["properties"]["items"]["items"] = reference(resource);
    }
    if let Some(resource) = name.strip_prefix("Accepted_") {
        let description = schema["properties"]["resource"]["description"].clone();
        schema["properties"]["resource"] = json!({ "oneOf": [{ "type": "null" }, reference(resource)] });
        if description.is_string() {
            schema["properties"]["resource"]["description"] = description;
        }
    }
}

/// A body that may be left out is not one that may be null.
pub(super) fn make_optional(body: &mut Value) {
    let mut optional = false;
    for content in body["content"].as_object_mut().into_iter().flat_map(Map::values_mut) {
        let choices = content["schema"]["oneOf"].as_array().cloned().unwrap_or_default();
        let rest: Vec<Value> = choices.iter().filter(|choice| choice["type"] != "null").cloned().collect();
        if rest.len() == 1 && choices.len() == 2 {
            content["schema"] = rest[0].clone();
            optional = true;
        }
    }
    if optional {
        body["required"] = json!(false);
    }
}

/// Takes null from the members of a merge patch that cannot be removed; the type has it only to tell absence.
pub(super) fn forbid_nulls(schema: &mut Value, removable: &[&str]) {
    let Some(properties) = schema["properties"].as_object_mut() else { return };
    for (property, schema) in properties {
        if removable.contains(&property.as_str()) {
            continue;
        }
        if let Some(types) = schema["type"].as_array() {
            let rest: Vec<Value> = types.iter().filter(|t| *t != "null").cloned().collect();
            schema["type"] = if rest.len() == 1 { rest[0].clone() } else { Value::Array(rest) };
        }
        if let Some(choices) = schema["oneOf"].as_array() {
            let rest: Vec<Value> = choices.iter().filter(|c| c["type"] != "null").cloned().collect();
            schema["oneOf"] = Value::Array(rest);
        }
    }
}
